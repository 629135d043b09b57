"""The implementation.  Nothing in here is public: names are in `statewise`, `statewise.errors`, `statewise.results`."""
