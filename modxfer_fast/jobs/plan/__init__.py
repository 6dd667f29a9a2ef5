"""`modxfer plan`: what a job will need of each rank, before anything is loaded."""
