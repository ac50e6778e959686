"""`ctinstruct app`: a local web page, and the same as an HTTP interface."""
