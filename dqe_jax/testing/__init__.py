"""For tests, ours and our users': nothing else imports this room."""
