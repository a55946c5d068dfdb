"""Queries that are made: from tables of attributes, or from captions."""
