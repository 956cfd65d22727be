"""Objects under a URI."""
