"""Pages for those who do not use a terminal: one with a server on this computer, one without any."""
