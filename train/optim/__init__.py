"""Optimizers, moving average, precision, ZeRO-1, sums over processes. The learning rate is arithmetic and stands in recipe/."""
