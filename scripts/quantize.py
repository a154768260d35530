"""Quantizes a GGUF file: the same as `trichord quantize`."""

import sys

from trichord.cli import main

sys.exit(main(["quantize", *sys.argv[1:]]))
