"""From lines to training tars.

The stages in order, tables in -> tables out:

1. register: sources -> ``sources``, ``urls``
2. screen_keys, url_duplicates, screened: ``urls`` -> ``screened``
3. fetch, fetched: ``screened``, ``urls`` -> ``images``, ``fetch_log``; ``fetched``
4. look: ``fetched``, ``images`` -> ``hashes``, ``detections``
5. opinion, safety: ``fetched``, ``hashes``, ``detections`` -> ``opinions``, ``safety``
6. fit_pca_hash, pca_hash, near_codes, near_pairs, near_groups, near: ``safety``, ``hashes`` -> ``near``
7. fit_descriptor, describe: ``near``, ``detections`` -> ``descriptors``
8. fit_quantiser, edges, components, duplicates: ``near``, ``descriptors`` -> ``edges``, ``components``, ``duplicates``
9. leaks, leakage: ``duplicates``, ``components``, ``reference_edges`` -> ``leaks``, ``leakage``
10. fit_embedder, embed: ``leakage``, ``detections`` -> ``embeddings``
11. fit_kmeans, fit_hierarchy, cluster: ``leakage``, ``embeddings`` -> ``clusters``
12. semantic_duplicates, semantic: ``leakage``, ``clusters``, ``embeddings`` -> ``semantic``
13. queries, quotas, candidates, neighbours: ``semantic``, ``clusters``, ``embeddings`` -> ``neighbours``, ``retrieval``
14. offers, selection: ``semantic``, ``neighbours``, ``leaks`` -> ``offers``, ``selection``, ``choices``
15. export: ``selection``, ``urls``, ``images``, ``detections`` -> ``tars/``, ``manifest``, ``shards``
"""
