"""What people touch: the command line, the page it writes, what a notebook needs, the site."""
