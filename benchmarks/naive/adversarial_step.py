"""The usual way to an adaptive adversarial weight: two more differentiations of one graph that holds everything."""

import torch


def adversarial_backward(features, last_layer, target, perceptual, discriminator, weights):
    """
    Gradients of 5 MSE + LPIPS + g 0.75 L_G with respect to `features`, what goes into `last_layer`, and to its weights.

    Args:
        features (`torch.Tensor` of shape `(B, C, S, S)`): requires a gradient.
        last_layer (`nn.Conv2d`): makes the image.
        perceptual, discriminator: modules.
        weights (`dict[str, float]`): of the three terms.
    """
    image = last_layer(features)
    mse = torch.nn.functional.mse_loss(image, target)
    distance = perceptual(image, target).mean()
    generator = -discriminator(image).mean()
    norms = [
        torch.autograd.grad(term, last_layer.weight, retain_graph=True)[0].norm()
        for term in (mse + distance, generator)
    ]
    adaptive = (norms[0] / (norms[1] + 1e-4)).clamp(0.3, 10).detach()
    total = weights["reconstruction_mse"] * mse + weights["perceptual"] * distance
    total = total + adaptive * weights["generator"] * generator
    total.backward()
    return adaptive
