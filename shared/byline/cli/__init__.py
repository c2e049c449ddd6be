"""The ``byline`` command. Each module is one command or one group of commands; ``app`` puts them together."""
