"""The larger comparison: plain and RA3 mid-training of a real model at equal updates and equal time, pass@k, GRPO.

It runs as stages, each a command of `ra3` in a process of its own, that save what they did and go on. So it fits on
a machine that is lent for ten minutes at a time: `python -m benchmarks.gpu FOLDER --preset h100`, again
and again until it says that all is done. The preset `cpu` is the table on real code for two CPU cores.
"""
