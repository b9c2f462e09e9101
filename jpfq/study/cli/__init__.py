"""The command `jpfq`. Each group of subcommands has a module that adds their options to the parser and runs them."""

from .command import main as main
