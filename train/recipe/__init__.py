"""The recipe as arithmetic, without torch: order, buckets, captions, tag policy, exclusions, learning rate, random numbers. Nothing here opens a file of the user's."""
