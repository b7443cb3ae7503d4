"""The demo in examples/: does its encoder agree with its reference?"""
