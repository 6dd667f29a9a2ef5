"""How each kind of PEFT module is rewritten through maps; one file a kind."""
