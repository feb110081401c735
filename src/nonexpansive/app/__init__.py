"""The faces: they parse, call, print and show. No mathematics here."""
