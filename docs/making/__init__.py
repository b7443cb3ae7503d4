"""What pages show that is made from code and from result files, when the site is built."""
