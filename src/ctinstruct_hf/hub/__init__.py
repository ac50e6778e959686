"""Between this package and the Hub: the authors' checkpoint, cards, publishing."""
