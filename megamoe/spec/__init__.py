"""The facts about the layer, independent of who computes it. Each fact stands here once.

``formats`` has the number formats; ``forms`` the comparison of a tensor's elements; ``tensors`` the
shape, dtype and form of every tensor by name; ``contract`` the rules of each stage, revision by
revision; ``models`` the sizes that users run; ``accumulators`` the ways in which a kernel may add;
``problem`` the input of a backend. No module here computes the layer.
"""
