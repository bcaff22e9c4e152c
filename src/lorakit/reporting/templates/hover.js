// Shows the numbers of the mark nearest to the pointer, or of the mark chosen with the arrow keys.
"use strict";
(() => {
  const tip = document.getElementById("tip");
  let shown = null;

  const hide = () => {
    shown?.classList.remove("on");
    shown = null;
    tip.hidden = true;
  };

  const show = (mark) => {
    if (mark === shown) return;
    hide();
    shown = mark;
    mark.classList.add("on");
    tip.textContent = mark.dataset.t;
    tip.hidden = false;
    const at = mark.getBoundingClientRect();
    const left = at.x + at.width / 2 - tip.offsetWidth / 2;
    const above = at.y - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(8, Math.min(left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${above > 8 ? above : at.bottom + 8}px`;
  };

  for (const svg of document.querySelectorAll("svg.chart")) {
    const marks = [...svg.querySelectorAll("[data-t]")];
    if (!marks.length) continue;
    const cells = marks[0].closest(".mark-rect") !== null;

    const nearestTo = (event) => {
      if (event.target.dataset?.t) return event.target;
      if (cells) return null;
      let nearest = null;
      let least = 60;
      for (const mark of marks) {
        const at = mark.getBoundingClientRect();
        // Horizontal distance counts more: readers look for the value at an x.
        const across = Math.abs(at.x + at.width / 2 - event.clientX);
        const distance = across + 0.3 * Math.abs(at.y + at.height / 2 - event.clientY);
        if (distance < least) [nearest, least] = [mark, distance];
      }
      return nearest;
    };

    const point = (event) => {
      const mark = nearestTo(event);
      if (mark) show(mark);
      else hide();
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      const index = marks.indexOf(shown) + step;
      show(marks[(index + marks.length) % marks.length]);
    });
  }
  addEventListener("scroll", hide, { passive: true });
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
  });
})();
