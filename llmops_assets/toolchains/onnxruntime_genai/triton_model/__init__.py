"""The files that a package takes along into Triton. They import nothing of this project."""
