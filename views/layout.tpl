<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<meta name="description" content="Two cats dressed as donuts, Pita and Fruit Gummi, want your vote. See live who leads.">
% if defined("origin"):
<meta property="og:type" content="website">
<meta property="og:title" content="{{title}}">
<meta property="og:description" content="Two cats dressed as donuts, Pita and Fruit Gummi, want your vote.">
<meta property="og:url" content="{{origin}}/">
<meta property="og:image" content="{{origin}}{{static_url("card.png")}}">
<meta property="og:image:width" content="1200">
<meta property="og:image:height" content="630">
<meta property="og:image:alt" content="Two cats, each with its head through a donut">
<meta name="twitter:card" content="summary_large_image">
% end
<meta name="color-scheme" content="light dark">
<meta name="theme-color" content="#f58bb6" media="(prefers-color-scheme: light)">
<meta name="theme-color" content="#8c3a5e" media="(prefers-color-scheme: dark)">
<link rel="icon" href="{{static_url("icon.svg")}}" type="image/svg+xml">
<link rel="stylesheet" href="{{static_url("catvote.css")}}">
</head>
<body>
<header><nav><a href="/">Vote</a> <a href="/history">History</a></nav></header>
<main>
{{!base}}
</main>
<footer>All we store is the cat and the time: no name, no cookie.</footer>
</body>
</html>
