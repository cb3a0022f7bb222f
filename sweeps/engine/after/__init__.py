"""The steps that follow a search: export the best trial, judge the best ones, train and test the winner."""
