// The widget manager asks for the queue of MathJax 2; these pages load MathJax 3.
window.addEventListener("load", () => {
  const mathjax = window.MathJax;
  if (!mathjax || !mathjax.startup || mathjax.Hub) {
    return;
  }
  let queue = mathjax.startup.promise;
  mathjax.Hub = {
    Queue: ([, , element]) => {
      queue = queue.then(() => mathjax.typesetPromise([element]));
    },
  };
});
