"""The commands of `relay`, a module a group. They translate words into calls and results into files and lines."""
