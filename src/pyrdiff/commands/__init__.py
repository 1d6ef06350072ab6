"""One module a command of `pyrdiff`: its settings and `main(args)`. The examples call the same functions."""
