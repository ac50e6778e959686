"""One module a public data set: what its folder looks like, turned into cases."""
