"""The modes of main.py: one module per mode, each with a function run() that drives it from a config.

A mode opens files, allocates arrays, prints and writes; everything below it does as it is told. Modes may import all
other packages, and each other.
"""
