// The keys work as soon as the page is open.
document.querySelector('.viewer-stage')?.focus({preventScroll: true, focusVisible: false});
