from noisyq_fast.info import info

print(info())
