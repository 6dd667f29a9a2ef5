"""`modxfer cache`: what a teacher answers to the rows of a job, kept for its students."""
