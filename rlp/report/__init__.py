"""What a run measured, for people: the table on the terminal and the figures."""
