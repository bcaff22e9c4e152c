// The tokens of an answer, coloured by how much the adapter changed their probability.

const STEPS = [0.25, 1, 2.5]; // differences of log-probabilities, in nats

/** Return the class of a token: up1 to up3, down1 to down3, or nothing. */
function shade(difference) {
  const size = STEPS.filter((step) => Math.abs(difference) >= step).length;
  return size ? `${difference > 0 ? "up" : "down"}${size}` : "";
}

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  if (value >= 99.95) return "100 %";
  return value >= 0.1 ? `${value.toFixed(value < 10 ? 1 : 0)} %` : "below 0.1 %";
}

/** Return a difference of log-probabilities as a factor. */
function factor(difference) {
  const ratio = Math.exp(Math.abs(difference));
  if (ratio < 1.05) return "as likely as under the base";
  const shown = ratio > 9999 ? "over 9,999" : ratio.toFixed(ratio < 10 ? 1 : 0);
  return `${shown} times as ${difference > 0 ? "likely" : "unlikely"} as under the base`;
}

/**
 * Cut a text into its tokens. Tokens that are parts of one character become one piece, and tokens that are not in the
 * text, such as the one that ends an answer, are left out.
 */
function pieces(text, tokens) {
  const found = [];
  let at = 0;
  let held = { logprob: 0, base: 0 };
  for (const token of tokens) {
    const start = token.text && !token.text.includes("\ufffd") ? text.indexOf(token.text, at) : -1;
    if (start < 0 || (start > at && !held.logprob)) {
      held = { logprob: held.logprob + token.logprob, base: held.base + token.base };
      continue;
    }
    if (start > at) found.push({ text: text.slice(at, start), ...held });
    held = { logprob: 0, base: 0 };
    at = start + token.text.length;
    found.push({ text: token.text, logprob: token.logprob, base: token.base });
  }
  if (at < text.length) found.push({ text: text.slice(at), ...held });
  return found;
}

/** Show an answer's tokens in `place`, with their numbers on hover and focus. */
export function showTokens(place, answer, under) {
  const spans = pieces(answer.text, answer.tokens).map(({ text, logprob, base }) => {
    const span = document.createElement("span");
    span.textContent = text;
    span.className = `token ${shade(logprob - base)}`;
    span.tabIndex = -1;
    span.dataset.tip = `${percent(logprob)} under ${under}, ${percent(base)} under the base: ${factor(logprob - base)}`;
    return span;
  });
  place.replaceChildren(...spans);
  if (spans.length) spans[0].tabIndex = 0;
  place.setAttribute("role", "group");
  place.setAttribute("aria-label", "Tokens of the answer. Arrow keys move between them.");
}

/** Let pointers, and the arrow keys, show the numbers of the tokens in a part of the page. */
export function watchTokens(root, tip) {
  const show = (token) => {
    tip.textContent = token.dataset.tip;
    tip.hidden = false;
    const at = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(at.left, 8), innerWidth - own.width - 8);
    const top = at.top - own.height - 6;
    tip.style.left = `${left}px`;
    tip.style.top = `${top < 8 ? at.bottom + 6 : top}px`;
  };
  const hide = () => {
    tip.hidden = true;
  };
  const tokenOf = (event) => event.target.closest?.(".token");
  root.addEventListener("pointerover", (event) => (tokenOf(event) ? show(tokenOf(event)) : hide()));
  root.addEventListener("pointerleave", hide);
  root.addEventListener("focusin", (event) => {
    const token = tokenOf(event);
    if (!token) return hide();
    token.setAttribute("aria-describedby", tip.id);
    show(token);
  });
  root.addEventListener("focusout", (event) => {
    tokenOf(event)?.removeAttribute("aria-describedby");
    hide();
  });
  root.addEventListener("scroll", hide, true);
  root.addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    if (!token || event.altKey || event.ctrlKey || event.metaKey) return; // Alt with an arrow is Back
    if (event.key === "Escape") return hide();
    const place = token.parentNode;
    const next = {
      ArrowRight: token.nextElementSibling,
      ArrowDown: token.nextElementSibling,
      ArrowLeft: token.previousElementSibling,
      ArrowUp: token.previousElementSibling,
      Home: place.firstElementChild,
      End: place.lastElementChild,
    }[event.key];
    if (!next) return;
    event.preventDefault();
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}
