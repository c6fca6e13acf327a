"""The commands of the command line, one file each; they import torch only when they run."""
