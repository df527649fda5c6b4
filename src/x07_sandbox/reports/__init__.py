"""Result documents: our JSON result, later X07's reports."""
