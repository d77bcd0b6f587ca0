// A map with levels that are known before the launch: `levels_of(channel)`, whatever `Op` takes.
#pragma once

#include "walk.cuh"

namespace noisyq::cuda {

template <class Op, class T, class Out, int N, class LevelsOf>
__global__ void __launch_bounds__(kThreads)
    known_kernel(const T* x, Out* y, Layout layout, int splits, LevelsOf levels_of) {
  const Share<N> share(layout, splits);
  const auto* packs = reinterpret_cast<const Pack<T, N>*>(x);
  auto* out = reinterpret_cast<Pack<Out, N>*>(y);
  share.backwards(packs, [&] {
    const auto levels = levels_of(share.channel);
    return [=](int64_t at, const Pack<T, N>& pack) {
      store(out + at, map_pack<Op, Out>(pack, levels));
    };
  });
}

template <class Op, class T, class Out, class LevelsOf>
Status map_known(const T* x, Out* y, Layout layout, int splits, LevelsOf levels_of, Stream stream) {
  layout = as_run(layout);
  const auto kernel = fits_packs<T, Out>(layout, x, y)
                          ? known_kernel<Op, T, Out, kPerAccess<T, Out>, LevelsOf>
                          : known_kernel<Op, T, Out, 1, LevelsOf>;
  return launch(kernel, {layout.channels * splits, kThreads}, stream, x, y, layout, splits,
                levels_of);
}

}  // namespace noisyq::cuda
