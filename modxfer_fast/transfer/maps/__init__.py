"""Linear maps between the spaces of a teacher and a student, and the methods that fit them."""
