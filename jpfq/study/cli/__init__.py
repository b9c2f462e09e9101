"""The command `jpfq`. A module for each group of subcommands adds their options to the parser and says how they run."""

from .command import main as main
