"""Charts: a tidy data frame in, an Altair chart out. Nothing else imports Altair."""
