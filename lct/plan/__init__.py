"""Ask the compiler of a machine that nobody here owns: targets, and what a compiled program says."""
