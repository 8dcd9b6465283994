"""What functions tell torch.compile about themselves."""


def constant(function):
    """`torch.compiler.assume_constant_result`: torch.compile calls it once and keeps what it gets.

    That one imports all of the compiler to set this attribute: two seconds of every `import
    kdkernels`, for programs that compile nothing.
    """
    function._dynamo_marked_constant = True
    return function
