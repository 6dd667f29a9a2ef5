"""What the commands run: jobs of stages, and the folders that they leave."""
