"""What is true of the layer whoever computes it: each fact stands here once.

``formats`` the number formats; ``forms`` how the elements of a tensor are compared; ``tensors`` the
shape, dtype and form of every tensor by name; ``contract`` what each stage computes, revision by
revision; ``models`` the sizes that users run; ``accumulators`` how a kernel may add; ``problem``
what a backend is given. Nothing in here computes the layer.
"""
