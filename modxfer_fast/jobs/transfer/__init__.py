"""`modxfer transfer`: a PEFT module trained on a teacher, moved to a student."""
