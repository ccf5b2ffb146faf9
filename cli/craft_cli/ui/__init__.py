"""What goes on the screen: progress on stderr, results on stdout."""
