"""Ideas on trial: what stands here may change or go without notice, and no other room imports it.

An idea gets a room with a configuration and a trainer of its own, which subclass [`RA3Config`] and [`RA3MidTrainer`].
One that proves itself moves into the rooms of its parts; one that does not goes.
"""
