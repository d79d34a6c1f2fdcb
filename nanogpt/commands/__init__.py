"""The programs: each has `main(argv)`, and `cli` finds it by its name."""
