"""billm-chat: talk to a `.billm` model in the terminal, or ask it one question from a script."""
