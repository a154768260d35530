"""The subcommands of `trichord`, one module each: `add_arguments(parser)` and `run(options)`, the exit status."""
