from noisyq_fast.environment import info

print(info())
