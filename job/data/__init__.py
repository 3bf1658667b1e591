"""From a data set to decoded rows on local disk."""
