"""The commands, one small module each: they read the arguments, call a lower room and print."""
